"""Reports on runs: tables, pictures, pages."""
