"""One experiment a file, each takes the lab."""
