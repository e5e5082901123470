"""What every part uses: plugins, recipes, processes, pictures."""
