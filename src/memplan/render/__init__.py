"""Results as text for people: tables, HTML and plots. Nothing here computes; it formats what a result holds."""
