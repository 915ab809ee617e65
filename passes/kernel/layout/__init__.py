"""From shapes to tables and integers: geometry, packing, schedule, memory."""
