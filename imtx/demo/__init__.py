"""What the page needs: checked requests, the three tasks, the streaming canvas and the gallery it opens with."""
