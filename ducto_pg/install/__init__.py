"""What `setup()` does, and the SQL that it ships."""
