"""What runs are shown with: tables, pictures, pages."""
