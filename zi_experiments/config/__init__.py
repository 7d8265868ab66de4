"""The configuration: schema, composition from YAML, validation, and error messages that say what to type."""
