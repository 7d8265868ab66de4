"""What may be asked: the schema, its composition from YAML, validation, and errors that say what to type."""
