"""Units that are cut out of a module, out of a student, and until a target is reached."""
