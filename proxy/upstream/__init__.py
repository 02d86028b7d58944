"""The only way out: connections to upstreams, their time limits, their errors in our words."""
