"""Several trainings compared: run as child processes, worked off one by one, read and tabled."""
