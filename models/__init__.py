"""The model catalogue (YAML data under catalogue/)."""
