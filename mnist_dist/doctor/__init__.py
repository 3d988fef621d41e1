"""What stands in the way of a run on this machine, found before it starts. Only looks; changes nothing."""
