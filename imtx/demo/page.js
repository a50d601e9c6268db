// Run when the page is there. Gradio gives examples no names: each gets that of its file, for screen readers and the mouse.
() => {
  const name = () => {
    for (const button of document.querySelectorAll('.gallery-item:not([aria-label])')) {
      const source = button.querySelector('img')?.src;
      if (!source) continue;
      button.title = decodeURIComponent(source.split('/').pop()).replace(/\.\w+$/, '');
      button.setAttribute('aria-label', button.title);
    }
  };
  name();
  new MutationObserver(name).observe(document.body, { childList: true, subtree: true });  // a tab is made when it is opened
}
