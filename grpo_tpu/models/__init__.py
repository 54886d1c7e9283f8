"""Networks: how parameters turn tokens and images into log-probabilities."""
