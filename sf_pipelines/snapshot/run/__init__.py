"""What a build is made of: its configuration, its run, its receipts, its tasks."""
