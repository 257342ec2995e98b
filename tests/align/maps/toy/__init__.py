"""A type of map in two files, as anybody would add one."""
