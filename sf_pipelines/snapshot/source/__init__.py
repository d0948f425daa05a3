"""The source table: files, data contract, samples."""
