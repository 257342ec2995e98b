"""How the small model that comes with this package was trained: its text, its tokenizer, its weights, its figures."""
