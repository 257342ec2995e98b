"""Maps between two models' hidden states, fitted from a feature store alone, and similarity between all layers."""
