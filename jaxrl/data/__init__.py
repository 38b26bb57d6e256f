"""Problems and demonstrations: where they come from, in which order they are drawn, how they are packed."""
