"""The Gradio demo: `canvas.py` is the picture that draws itself pixel by pixel in the browser."""
