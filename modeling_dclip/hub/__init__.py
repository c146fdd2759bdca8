"""What meets other projects' formats: conversion of their checkpoints, export to ONNX."""
