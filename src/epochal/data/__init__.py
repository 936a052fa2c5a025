"""What a run reads: sources, tables, order, batches, windows."""
