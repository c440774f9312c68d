"""Raw files and folders as records, each with its place."""
