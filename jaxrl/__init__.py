"""jaxrl: reinforcement learning for language models that think with tools, in JAX.

Shapes are written with one legend of letters, in comments and in einsum strings:

    B rows                T tokens in a row        S decode slots
    P KV pages            L layers                 D model width
    N query heads         K KV heads               H head width
    F feed-forward width  V vocabulary             E experts
    G trajectories in a group                      U response tokens of all trajectories in a row
"""

__version__ = "0.1.0"
