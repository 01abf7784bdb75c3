"""What a run leaves on disk and how its processes meet: directories, state, records, devices."""
