"""How fast this machine trains, where the time of a step goes, and what would change it."""
