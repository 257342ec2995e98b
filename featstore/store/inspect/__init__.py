"""What a store holds, and whether it is whole."""
