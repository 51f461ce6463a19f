// What tests of the picture ask of the page.
({
  // Arrows that begin or end at no box of their parent.
  dangling() {
    return [...document.querySelectorAll('.edge')].filter(edge => {
      const keys = new Set(['in', 'out', ...[...edge.parentNode.children].map(e => e.dataset.key)]);
      return !keys.has(edge.dataset.from) || !keys.has(edge.dataset.to);
    }).map(edge => edge.dataset.from);
  },
  // Boxes that lie on another one of their parent, or leave it.
  overlapping() {
    const place = box => box.querySelector('.frame').getBoundingClientRect();
    return [...document.querySelectorAll('.box')].filter(box => {
      const a = place(box), others = [...box.parentNode.children].filter(e => e !== box && e.matches('.box'));
      const outer = box.parentNode.closest('.box'), b = outer && place(outer);
      if (b && (a.left < b.left || a.right > b.right || a.top < b.top || a.bottom > b.bottom)) return true;
      return others.map(place).some(b => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom);
    }).map(box => box.dataset.key);
  },
  // A point beside the arrow from the first norm to the attention.
  arrow() {
    const [edge] = [...document.querySelectorAll('.edge')].filter(e => /self_attn$/.test(e.dataset.to) && e.dataset.from !== 'in');
    const {x, y} = edge.getPointAtLength(edge.getTotalLength() / 2).matrixTransform(edge.getScreenCTM());
    return [x, y + 3];
  },
  // What the marked arrows lead to.
  marked() {
    return [...document.querySelectorAll('.edge.on')].map(edge => edge.dataset.to.replace(/^op:\d+$/, 'op'));
  },
  // Seconds to open and draw all boxes.
  opened() {
    const start = performance.now();
    [...document.querySelectorAll('button')].find(b => b.textContent === 'Open all').click();
    document.body.getBoundingClientRect();
    return (performance.now() - start) / 1e3;
  },
})
