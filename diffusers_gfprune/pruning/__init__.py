"""Channel groups and units, costs, budgets, schedules, masks and compaction."""
