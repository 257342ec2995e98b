"""What run directories hold, and the words and numbers that show it."""
