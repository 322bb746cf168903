"""What touches names in a file system: deletes, follows links, tries whether a place can be written."""
