"""How the embedded model came to be: its world, its trainer."""
