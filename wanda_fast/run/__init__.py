"""One job: options to resources, the block loop, the report."""
