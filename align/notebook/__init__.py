"""What `import align` gives to a notebook: runs, maps, similarities and leaderboards that print and draw themselves."""
