"""Names of the same module in different namings, as rows, and the engine that looks them up."""
