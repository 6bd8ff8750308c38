"""Load: many calls, from threads and processes, under signals, faults and errors."""
