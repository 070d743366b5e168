"""Every operation in plain torch: defines what is right."""
