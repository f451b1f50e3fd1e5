"""Students without some of the units of their modules: the penalty, the order, the targets."""
