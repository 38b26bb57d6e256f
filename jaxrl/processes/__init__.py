"""One run in several processes: how they meet, what they tell each other, and how they stop together."""
