"""Results read, compared, drawn and written as pages."""
