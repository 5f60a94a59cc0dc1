"""Pages, tables and figures from the records of a run."""
