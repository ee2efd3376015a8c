"""Names that modules written for Miles import; the parts live in `miles.rollout.filters` and `miles.interfaces`."""
