"""What any other module may use: argument checks, whole files, clean terminal output, the machine by name, imports."""
