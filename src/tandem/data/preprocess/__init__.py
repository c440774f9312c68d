"""Raw data into .bin/.idx files."""
