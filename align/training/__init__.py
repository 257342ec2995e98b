"""Maps trained by gradient on cached pairs: what is trained, against what, and the loop that does it."""
