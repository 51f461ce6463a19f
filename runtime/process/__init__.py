"""What this process may use and how it does: processors, memory, threads, the garbage collector."""
