// A graph as boxes and arrows in SVG, laid out box by box by dagre.
import {bytes,el,percent,plural} from './elements.js';
import {D,R,T,ATTRS,MODULE,NAME,irText,namesOf,outputs,word} from './ops.js';
import {IN,OUT,shortName} from './tree.js';

export const HEAD=30,LEADING=15;
const PAD=12,CELL=34,GAP=4;
const KINDS=[['experts',/^(grouped\.|moec?\.)/],['attention',/attention|rotary|softmax|sdpa/],
  ['matrix product',/linear|matmul|\bmm\b|bmm|addmm|conv|einsum|lowp|quant/],['normalisation',/norm/],['lookup',/embedding|gather|index|scatter|nonzero|where/],
  ['layout',/reshape|permute|view|transpose|cat\b|slice|expand|cast|clone|split|squeeze|_to_copy|contiguous|stack/]];
export const KIND_NAMES=[...KINDS.map(k=>k[0]),'other'];
export const kindOf=name=>{const at=KINDS.findIndex(([,p])=>p.test(name));return at<0?KINDS.length:at};

export function svg(tag,props={},...children){
  const e=document.createElementNS('http://www.w3.org/2000/svg',tag);
  for(const[k,v]of Object.entries(props))if(k.startsWith('on'))e.addEventListener(k.slice(2),v);
    else if(v!==undefined&&v!==false)e.setAttribute(k,v);
  e.append(...children.filter(c=>c!==null&&c!==undefined));
  return e;
}
const text=(x,y,words,props={})=>svg('text',{x,y,...props},words);
const pens=new Map();
function widthOf(words,font){
  if(!pens.has(font)){const pen=document.createElement('canvas').getContext('2d');pen.font=font;pens.set(font,pen)}
  return pens.get(font).measureText(words).width;
}
const BOLD='600 13px ui-sans-serif,system-ui,sans-serif',SMALL='11px ui-sans-serif,system-ui,sans-serif';
const clip=(words,most=44)=>words.length>most?`${words.slice(0,most-1)}…`:words;

// What a box says: its title, and smaller lines.
const stored=new Map(D.weights.flatMap(w=>namesOf(w).map((n,i)=>[n,i?null:w])));
const inModule=(path,module)=>module===path||module.startsWith(`${path}.`)||module.startsWith(`${path} `);
const phase=D.profile&&(D.profile.phases.find(p=>p.name==='decode')??D.profile.phases[0]);
export function timeOf(path){
  if(!phase||!path)return 0;
  return D.calls.filter(c=>c.function===phase.function).reduce((n,c)=>n+(inModule(path,c.module)?phase.kernels[c.call].time.seconds:0),0);
}
const share=box=>{
  if(!phase||box.kind==='op'||box.kind==='part')return 0;
  return(box.kind==='stack'?box.children:[box]).reduce((n,b)=>n+timeOf(b.path),0)/phase.call;
};
const weightBytes=box=>box.kind==='group'?D.weights.reduce((n,w)=>n+(inModule(box.path,w.module)?w.bytes:0),0):
  box.children.reduce((n,c)=>n+weightBytes(c),0);
export function linesOf(box){
  if(box.kind==='port')return[box.type];
  const lines=[];
  if(box.kind==='op'){
    const [first,...more]=outputs(box.id),weights=(box.weights??[]).map(n=>stored.get(n)).filter(Boolean);
    lines.push(`${first?first[2]:''}${more.length?` and ${more.length} more`:''}`);
    if(weights.length)lines.push(`${bytes(weights.reduce((n,w)=>n+w.bytes,0))} ${weights[0].format}`);
    if(box.experts)lines.push(plural(box.experts,'expert'));
  }else{
    const block=box.block??(box.kind==='stack'&&box.children.every(c=>c.block)?box.children[0].block:null),size=weightBytes(box);
    if(block)lines.push(`${plural(block.experts,'expert')}, ${block.top_k} per token`);
    if(box.kind==='stack')lines.push(`${box.children.length} alike`);
    lines.push([plural(box.size,'op'),size?bytes(size):'',share(box)>0.0005?`${percent(share(box))} of ${phase.name}`:''].filter(Boolean).join(' · '));
  }
  if(box.reads.size)lines.push(`reads ${[...box.reads.values()].join(', ')}`);
  return lines.map(l=>clip(l));
}
export const titleOf=box=>clip(box.kind==='op'?box.module?`${box.module} · ${box.label}`:box.label:box.label);
const opens=box=>box.children.length>0||box.experts>0;

// Sizes and places. A box that is open is as large as what it holds.
function measure(box,open){
  const lines=linesOf(box),changes=box.changed&&box.kind!=='op'?60:0;
  box.lines=lines;
  box.isOpen=opens(box)&&open.has(box.key);
  box.w=Math.max(96,widthOf(titleOf(box),BOLD)+(opens(box)?44:28)+changes,...lines.map(l=>widthOf(l,SMALL)+28));
  box.h=HEAD+LEADING*lines.length;
  if(!box.isOpen)return;
  if(box.experts){
    box.columns=Math.min(box.experts,box.experts>32?16:8);
    box.w=Math.max(box.w,box.columns*CELL+2*PAD-GAP);
    box.h+=Math.ceil(box.experts/box.columns)*CELL+PAD-GAP;
    return;
  }
  placeChildren(box,open);
  box.w=Math.max(box.w,box.inner.width);
  box.h+=box.inner.height-6;
}
export function placeChildren(box,open){
  for(const child of box.children)measure(child,open);
  const number=new Map([[IN,IN],[OUT,OUT],...box.children.map((c,i)=>[c.key,String(i)])]);
  const drawn=[...box.edges.values()].filter(e=>!e.hidden&&number.has(e.from)&&number.has(e.to));
  const places=placesOf(box.children.map(c=>[c.w,c.h]),drawn.map(e=>[number.get(e.from),number.get(e.to)]));
  box.children.forEach((child,i)=>Object.assign(child,places.boxes[i]));
  box.inner={...places,edges:places.edges.map((points,i)=>({...drawn[i],points}))};
}
// Boxes of the same sizes and arrows (those of layers that are alike) are laid out once.
const laidOut=new Map();
function placesOf(sizes,edges){
  const key=JSON.stringify([sizes,edges]);
  if(!laidOut.has(key))laidOut.set(key,layout(sizes,edges));
  return laidOut.get(key);
}
function layout(sizes,edges){
  const graph=new dagre.graphlib.Graph();
  graph.setGraph({rankdir:'TB',nodesep:20,ranksep:24,edgesep:12,marginx:PAD,marginy:PAD,ranker:sizes.length>80?'tight-tree':'network-simplex'});
  graph.setDefaultEdgeLabel(()=>({}));
  sizes.forEach(([width,height],i)=>graph.setNode(String(i),{width,height}));
  for(const border of[IN,OUT])if(edges.some(e=>e[border===IN?0:1]===border))graph.setNode(border,{width:8,height:1});
  for(const[from,to]of edges)graph.setEdge(from,to);
  sizes.forEach((_,i)=>{ // all boxes are between the borders
    if(graph.hasNode(IN)&&!graph.predecessors(String(i)).length)graph.setEdge(IN,String(i),{weight:0});
    if(graph.hasNode(OUT)&&!graph.successors(String(i)).length)graph.setEdge(String(i),OUT,{weight:0});
  });
  dagre.layout(graph);
  const nodes=sizes.map((_,i)=>graph.node(String(i))),rows=new Map(); // the height of each row, by its middle
  for(const{y,height}of nodes)rows.set(Math.round(y),Math.max(rows.get(Math.round(y))??0,height));
  const lines=edges.map(([from,to])=>graph.edge(from,to).points.slice(1,-1).flatMap(({x,y})=>{
    const half=(rows.get(Math.round(y))??0)/2;
    return half?[[x,y-half],[x,y+half]]:[]; // between rows of boxes an arrow needs no corner
  }));
  // dagre leaves room for boxes, and not for the arrows beside them.
  const xs=lines.flat().map(p=>p[0]),{width,height}=graph.graph();
  const left=Math.max(0,PAD/2-Math.min(...xs,PAD)),right=Math.max(0,Math.max(...xs,0)-width+PAD/2);
  const port=name=>graph.hasNode(name)?graph.node(name).x+left:null;
  return{width:width+left+right,height,in:port(IN),out:port(OUT),edges:lines.map(l=>l.map(([x,y])=>[x+left,y])),
    boxes:nodes.map(n=>({x:n.x-n.width/2+left,y:n.y-n.height/2,row:rows.get(Math.round(n.y))}))};
}
// Curves that leave and enter boxes downwards.
function pathOf(points){
  const f=n=>n.toFixed(1);
  let d=`M${f(points[0][0])} ${f(points[0][1])}`;
  for(let i=1;i<points.length;i++){
    const[a,b]=[points[i-1],points[i]],y=f((a[1]+b[1])/2);
    if(Math.abs(a[1]-b[1])>0.5)d+=a[0]===b[0]?`V${f(b[1])}`:`C${f(a[0])} ${y} ${f(b[0])} ${y} ${f(b[0])} ${f(b[1])}`;
  }
  return d;
}

// `pane` has open (keys), act(box, expert), isPicked(box), load(box, expert) and side.
export function draw(root,pane){
  placeChildren(root,pane.open);
  const{width,height}=root.inner,scale=pane.zoom;
  const picture=svg('svg',{class:'picture',width:width*scale,height:height*scale,viewBox:`0 0 ${width} ${height}`,
    role:'group','aria-label':pane.label},
    svg('defs',{},svg('marker',{id:`arrow${pane.side}`,viewBox:'0 0 8 8',refX:7,refY:4,markerWidth:7,markerHeight:7,orient:'auto-start-reverse'},
      svg('path',{d:'M0 0.5L8 4L0 7.5z',class:'tip'}))));
  picture.append(...drawChildren(root,pane,0));
  return picture;
}
// Pictures side by side as an SVG of their own: the page's style is written into the elements, as other programs read no variables.
const STYLE={text:['fill','font-family','font-size','font-weight'],'':['fill','stroke','stroke-width']};
export function svgFile(panes){
  const ground=getComputedStyle(panes[0].element.querySelector('.frame-scroll')).backgroundColor,space=20,titled=panes.length>1;
  let width=space,height=0;
  const parts=panes.flatMap(p=>{
    const picture=p.element.querySelector('.picture'),copy=picture.cloneNode(true),{width:w,height:h}=picture.viewBox.baseVal,copies=copy.querySelectorAll('*');
    picture.querySelectorAll('*').forEach((e,i)=>{
      const style=getComputedStyle(e);
      for(const name of STYLE[e.tagName]??STYLE[''])copies[i].setAttribute(name,style.getPropertyValue(name));
    });
    for(const[name,v]of Object.entries({x:width,y:titled?44:space,width:w,height:h}))copy.setAttribute(name,v);
    const title=text(width,28,titled?p.label:'',{'font-family':'sans-serif','font-size':16,fill:getComputedStyle(p.element).color});
    width+=w+space;height=Math.max(height,h+(titled?44:space)+space);
    return[title,copy];
  });
  return{width,height,text:new XMLSerializer().serializeToString(svg('svg',{width,height,viewBox:`0 0 ${width} ${height}`},svg('rect',{width,height,fill:ground}),...parts))};
}
function drawChildren(box,pane,top){
  const byKey=new Map(box.children.map(c=>[c.key,c])),out=[];
  const shift=box.parent?(box.w-box.inner.width)/2:0;
  const centre=child=>child.x+child.w/2;
  // Where an arrow leaves or enters: at the port of what is open, else towards its next corner.
  const meet=(key,enters,towards)=>{
    const child=byKey.get(key);
    if(!child)return enters?[box.inner.out,box.inner.height-1]:[box.inner.in,1];
    const port=child.isOpen&&child.inner?child.inner[enters?'in':'out']:null;
    const x=port===null?Math.max(child.x+14,Math.min(child.x+child.w-14,towards)):child.x+port+(child.w-child.inner.width)/2;
    return[x,enters?child.y:child.y+child.h];
  };
  for(const e of box.inner.edges){
    const from=byKey.get(e.from),to=byKey.get(e.to);
    const start=meet(e.from,false,e.points[0]?.[0]??(to?centre(to):box.inner.out)),end=meet(e.to,true,e.points.at(-1)?.[0]??(from?centre(from):box.inner.in));
    // Beside a box that is taller than theirs, arrows stay in their column.
    const leaves=from?[[start[0],from.y+from.h/2+from.row/2]]:[],enters=to?[[end[0],to.y+to.h/2-to.row/2]]:[];
    const points=[start,...leaves,...e.points,...enters,end].map(([x,y])=>[x+shift,y+top]);
    for(const[key,[x,y]]of[[IN,points[0]],[OUT,points.at(-1)]])if(e[key===IN?'from':'to']===key)out.push(svg('circle',{class:'border',cx:x,cy:y,r:3}));
    const values=box.edges.get(`${e.from}\n${e.to}`);
    const path=svg('path',{class:'edge','data-from':e.from,'data-to':e.to,d:pathOf(points),'marker-end':e.to===OUT?undefined:`url(#arrow${pane.side})`},
      svg('title',{},[...values.values].map(v=>T[v]).join(', ')));
    path.values=values.values;
    out.push(path);
  }
  for(const child of box.children)out.push(drawBox(child,pane,child.x+shift,child.y+top));
  return out;
}
function drawBox(box,pane,x,y){
  const kind=box.kind==='op'?`k${kindOf(word(box.id,NAME))}`:box.block?'k0':'';
  const mark=box.changed?pane.mark:'';
  const g=svg('g',{class:['box',box.kind,kind,mark,box.isOpen?'open':'',pane.isPicked(box)?'on':''].filter(Boolean).join(' '),
    transform:`translate(${x.toFixed(1)} ${y.toFixed(1)})`,tabindex:box.kind==='port'?undefined:-1,role:box.kind==='port'?undefined:'button',
    'data-key':box.key,'data-at':box.at,'aria-expanded':opens(box)?String(box.isOpen):undefined,
    'aria-label':[titleOf(box),...box.lines,mark&&(box.kind==='op'?pane.markWord:`${box.changed} ${pane.markWord}`)].filter(Boolean).join(', ')});
  if(box.kind==='stack'&&!box.isOpen)for(const n of[6,3])g.append(svg('rect',{class:'frame',x:n,y:n,width:box.w,height:box.h,rx:6}));
  g.append(svg('rect',{class:'frame',width:box.w,height:box.h,rx:box.kind==='port'?14:6}));
  if(kind)g.append(svg('path',{class:'strip',d:`M3 0H6V${box.h}H3Q0 ${box.h} 0 ${box.h-6}V6Q0 0 3 0z`}));
  g.append(text(14,20,titleOf(box),{class:'title'}));
  if(opens(box))g.append(text(box.w-12,20,box.isOpen?'−':'+',{class:'sign','text-anchor':'end'}));
  if(mark&&box.kind!=='op')g.append(text(box.w-(opens(box)?28:10),20,`${pane.mark==='gone'?'−':'+'}${box.changed}`,{class:'count','text-anchor':'end'}));
  box.lines.forEach((line,n)=>g.append(text(14,36+LEADING*n,line,{class:'line'})));
  if(!box.isOpen){
    const part=share(box);
    if(part>0.0005)g.append(svg('rect',{class:'part-of',x:0,y:box.h-3,width:Math.max(1,box.w*Math.min(1,part)),height:3,rx:1}));
  }else if(box.experts)g.append(...drawExperts(box,pane));
  else g.append(...drawChildren(box,pane,box.h-box.inner.height));
  g.append(svg('title',{},box.kind==='op'?irText(box.id):box.path||box.label));
  return g;
}
function drawExperts(box,pane){
  const top=HEAD+LEADING*box.lines.length+2,left=(box.w-box.columns*CELL+GAP)/2;
  return Array.from({length:box.experts},(_,e)=>{
    const load=pane.load(box,e),shade=load===null?'':`q${Math.max(0,Math.min(8,Math.round(load*4)))}`;
    return svg('g',{class:`box expert ${shade}`,'data-key':`${box.key}:${e}`,'data-expert':e,tabindex:-1,role:'button',
      'aria-label':`expert ${e}${load===null?'':`, ${load.toFixed(2)} times the mean load`}`,
      transform:`translate(${(left+e%box.columns*CELL).toFixed(1)} ${top+Math.floor(e/box.columns)*CELL})`},
      svg('rect',{class:'frame',width:CELL-GAP,height:CELL-GAP,rx:4}),text((CELL-GAP)/2,19,String(e),{class:'line','text-anchor':'middle'}),
      svg('title',{},`expert ${e}${load===null?'':`: ${load.toFixed(2)} times the mean load`}`));
  });
}
