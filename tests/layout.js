// What a reader cannot see: the page wider than the window; text outside of the box that clips it, which is a fault but in
// a box that scrolls; an image beyond the window; text of a drawing outside of the drawing, on other text, or too small.
() => {
  const found = [], wide = document.documentElement.scrollWidth - window.innerWidth;
  if (wide > 1) found.push(`the page is ${wide} pixels wider than the window`);
  const named = e => e.tagName.toLowerCase() + (e.id ? "#" + e.id : "") + (e.className && e.className.baseVal === undefined ? "." + String(e.className).trim().split(/\s+/).join(".") : "");
  const scrolls = s => ["auto", "scroll"].includes(s.overflowX);
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, parent = node.parentElement;
    if (!node.textContent.trim() || !parent.checkVisibility() || parent.closest("script, style, option, svg, .visually-hidden")) continue;
    const range = document.createRange(); range.selectNodeContents(node);
    const box = range.getBoundingClientRect();
    if (!box.width) continue;
    for (let e = parent; e; e = e.parentElement) {
      const s = getComputedStyle(e), r = e.getBoundingClientRect();
      if (scrolls(s)) break;
      if (["hidden", "clip"].includes(s.overflowX) && (box.right > r.right + 1 || box.left < r.left - 1)) {
        found.push(`${JSON.stringify(node.textContent.trim().slice(0, 40))} is cut off by ${named(e)}`); break;
      }
      if (e === document.body && box.right > window.innerWidth + 1) found.push(`${JSON.stringify(node.textContent.trim().slice(0, 40))} is beyond the window`);
    }
  }
  for (const image of document.images) {
    if (!image.checkVisibility()) continue;
    if (!image.naturalWidth) found.push(`an image is not shown: ${image.alt}`);
    const r = image.getBoundingClientRect();
    const box = image.closest(".scroll, [data-scroll]");
    if (!box && r.right > window.innerWidth + 1) found.push(`the image ${image.alt} is beyond the window`);
  }
  for (const box of document.querySelectorAll("table.film")) {
    const scroll = box.closest(".scroll");
    if (window.innerWidth >= 1280 && scroll && scroll.scrollWidth > scroll.clientWidth + 1) found.push(`the film is cut off: ${scroll.scrollWidth} in ${scroll.clientWidth}`);
  }
  for (const drawing of document.querySelectorAll("svg")) {
    if (!drawing.checkVisibility()) continue;
    const frame = drawing.getBoundingClientRect(), texts = [...drawing.querySelectorAll("text, [id^=text_]")].filter(t => t.getBoundingClientRect().width);
    const boxes = texts.map(t => [t, t.getBoundingClientRect()]);
    for (const [t, r] of boxes) {
      const said = t.textContent.trim().slice(0, 40) || t.id;
      if (r.left < frame.left - 1 || r.right > frame.right + 1 || r.top < frame.top - 1 || r.bottom > frame.bottom + 1) found.push(`${JSON.stringify(said)} is cut off by its drawing`);
    }
    for (let i = 0; i < boxes.length; i++) for (let j = i + 1; j < boxes.length; j++) {
      const [a, p] = boxes[i], [b, q] = boxes[j];
      if (a.contains(b) || b.contains(a)) continue;
      const x = Math.min(p.right, q.right) - Math.max(p.left, q.left), y = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
      if (x > 2 && y > 2) found.push(`${JSON.stringify(a.textContent.trim() || a.id)} and ${JSON.stringify(b.textContent.trim() || b.id)} lie on each other`);
    }
    const font = Math.min(...boxes.map(([, r]) => r.height));
    if (boxes.length && font < 7) found.push(`text of a drawing is ${font.toFixed(1)} pixels high`);
  }
  return [...new Set(found)];
}
