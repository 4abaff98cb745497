"""The main job: from a folder of images to a trained, tested network and its pictures."""
