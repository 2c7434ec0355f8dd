"""Teacher outputs on disk: by example and view, or by token."""
