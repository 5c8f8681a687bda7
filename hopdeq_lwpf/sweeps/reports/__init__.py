"""Tables, pictures and pages of what a study, a sweep or a comparison found."""
