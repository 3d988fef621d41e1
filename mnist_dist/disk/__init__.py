"""Files written whole or not at all, read up to a limit, never through a link; and locks. Without torch."""
